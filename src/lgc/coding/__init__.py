"""Bytes for indices, values and payloads. Nothing here communicates."""

from lgc.coding.bits import lane_width, lane_words, pack_lanes, unpack_lanes
from lgc.coding.dead_zone import DeadZone, Largest, Zoned
from lgc.coding.indices import IndexCoder, RangeCoder, RawIndices, Rice
from lgc.coding.payload import Kind, PayloadError, header_size, pack, size_limit, unpack
from lgc.coding.recent import Recent
from lgc.coding.recent_sign import RecentSign
from lgc.coding.values import BFloat16, Float16, Float32, LloydMax, Sign, Uniform, ValueCodec
from lgc.coding.zeros import decode_zeros, encode_zeros, zeros_bound

__all__ = [
    "BFloat16",
    "DeadZone",
    "Float16",
    "Float32",
    "IndexCoder",
    "Kind",
    "Largest",
    "LloydMax",
    "PayloadError",
    "RangeCoder",
    "RawIndices",
    "Recent",
    "RecentSign",
    "Rice",
    "Sign",
    "Uniform",
    "ValueCodec",
    "Zoned",
    "decode_zeros",
    "encode_zeros",
    "header_size",
    "lane_width",
    "lane_words",
    "pack",
    "pack_lanes",
    "size_limit",
    "unpack",
    "unpack_lanes",
    "zeros_bound",
]
