"""Learned gradient compression for PyTorch DistributedDataParallel.

>>> import lgc
>>> lgc.parse_scheme("lgc-ring:rate=0.002").rate
0.002
"""

from lgc.ddp import Handle, attach
from lgc.layout import Role
from lgc.schedule import Phase
from lgc.schemes import DGC, SCHEMES, Dense, LGCRing, LGCServer, ScaleCom, Scheme, TopK, parse_scheme
from lgc.version import __version__
from lgc.wire import Traffic, Wire

__all__ = [
    "DGC",
    "SCHEMES",
    "Dense",
    "Handle",
    "LGCRing",
    "LGCServer",
    "Phase",
    "Role",
    "ScaleCom",
    "Scheme",
    "TopK",
    "Traffic",
    "Wire",
    "__version__",
    "attach",
    "parse_scheme",
]
