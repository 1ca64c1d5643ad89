"""Checkpoints on disk: one safetensors file a rank and a JSON manifest, which is written last.

    DIR/step-0000001200/rank-0000.safetensors   tensors; everything else as JSON in the header's metadata
    DIR/step-0000001200/manifest.json           schema, versions, and per file its size, sha256 and tensors

Every file is written under a temporary name, synced and renamed. A folder without a valid manifest is not a
checkpoint. `DIR` must be one folder for all ranks (one machine or a shared file system), or become one before it is
read. Nothing is pickled.
"""

from lgc.checkpoint.distributed import distributed_state, load_distributed
from lgc.checkpoint.files import CheckpointError, RefusedError
from lgc.checkpoint.state import reshard
from lgc.checkpoint.together import (
    available,
    gather,
    latest,
    load,
    load_gathered,
    load_rank,
    resume,
    save,
    set_aside,
)

__all__ = [
    "CheckpointError",
    "RefusedError",
    "available",
    "distributed_state",
    "gather",
    "latest",
    "load",
    "load_distributed",
    "load_gathered",
    "load_rank",
    "reshard",
    "resume",
    "save",
    "set_aside",
]
