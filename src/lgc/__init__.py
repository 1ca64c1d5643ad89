"""Learned gradient compression for PyTorch DistributedDataParallel.

handle = lgc.attach(ddp_model, lgc.DGC(rate=0.01), optimizer)
"""

from lgc import checkpoint
from lgc.coding import BFloat16, Float16, Float32, RangeCoder, RawIndices, Rice, Sign, Uniform
from lgc.comm.traffic import Traffic, Wire
from lgc.ddp import Handle, attach
from lgc.phase import Phase
from lgc.rounds.layout import Role
from lgc.schemes import (
    BF16,
    DGC,
    FP16,
    SCHEMES,
    Auto,
    Dense,
    LGCRing,
    LGCServer,
    PowerSGD,
    ScaleCom,
    Scheme,
    TopK,
    parse_scheme,
)
from lgc.version import __version__

__all__ = [
    "BF16",
    "DGC",
    "FP16",
    "SCHEMES",
    "Auto",
    "BFloat16",
    "Dense",
    "Float16",
    "Float32",
    "Handle",
    "LGCRing",
    "LGCServer",
    "Phase",
    "PowerSGD",
    "RangeCoder",
    "RawIndices",
    "Rice",
    "Role",
    "ScaleCom",
    "Scheme",
    "Sign",
    "TopK",
    "Traffic",
    "Uniform",
    "Wire",
    "__version__",
    "attach",
    "checkpoint",
    "parse_scheme",
]
