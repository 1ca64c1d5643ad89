"""Learned gradient compression for PyTorch DistributedDataParallel.

handle = lgc.attach(ddp_model, lgc.DGC(rate=0.01), optimizer)
"""

from lgc import checkpoint
from lgc.attach import Handle, attach
from lgc.choice.choose import choose
from lgc.choice.cost import Link
from lgc.coding import (
    BFloat16,
    DeadZone,
    Float16,
    Float32,
    Largest,
    LloydMax,
    RangeCoder,
    RawIndices,
    Recent,
    RecentSign,
    Rice,
    Sign,
    Uniform,
)
from lgc.comm.replicas import ReplicaError
from lgc.comm.traffic import Traffic, Wire
from lgc.comm.transport import RankError
from lgc.phase import Phase
from lgc.rounds.layout import Role
from lgc.schemes import (
    DGC,
    SCHEMES,
    Dense,
    DenseBF16,
    DenseFP16,
    LGCRing,
    LGCServer,
    LocalSteps,
    PowerSGD,
    Quantized,
    ScaleCom,
    Scheme,
    Seconds,
    TopK,
    parse_scheme,
)
from lgc.synchronizer import Synchronizer
from lgc.version import __version__

__all__ = [
    "DGC",
    "SCHEMES",
    "BFloat16",
    "DeadZone",
    "Dense",
    "DenseBF16",
    "DenseFP16",
    "Float16",
    "Float32",
    "Handle",
    "LGCRing",
    "LGCServer",
    "Largest",
    "Link",
    "LloydMax",
    "LocalSteps",
    "Phase",
    "PowerSGD",
    "Quantized",
    "RangeCoder",
    "RankError",
    "RawIndices",
    "Recent",
    "RecentSign",
    "ReplicaError",
    "Rice",
    "Role",
    "ScaleCom",
    "Scheme",
    "Seconds",
    "Sign",
    "Synchronizer",
    "TopK",
    "Traffic",
    "Uniform",
    "Wire",
    "__version__",
    "attach",
    "checkpoint",
    "choose",
    "parse_scheme",
]
