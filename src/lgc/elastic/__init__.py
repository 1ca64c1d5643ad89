"""Local steps on machines that come and go, on torchft's lighthouse: see docs/elastic.md."""

from lgc.elastic.attach import ElasticHandle, attach
from lgc.elastic.lighthouse import NoQuorumError
from lgc.elastic.rounds import Stateful
from lgc.elastic.sampler import Sampler

__all__ = ["ElasticHandle", "NoQuorumError", "Sampler", "Stateful", "attach"]
