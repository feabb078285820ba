"""Regions of images as text: every model's format, the frames that models see, and the numbers of answers.

Nothing here needs torch or transformers.
"""

from .annotations import ImageRegions, read_annotations, record_regions, training_record, write_annotations
from .answers import Detection, Report, report
from .array_checks import check_boxes
from .arrays import decode_array, dequantize, encode_array, quantize
from .cells import CellNumbers, KosmosGrammar
from .checking import PROBLEMS, Problem, check_region, check_text
from .coco import read_coco, write_coco
from .codec import CoordinateError, DecodeResult, decode, encode
from .converting import convert
from .formats import FORMATS, CoordinateFormat, get_format, register_format
from .frames import (
    FitWithin,
    Frame,
    FrameRule,
    Original,
    PaddedSquare,
    Resized,
    SmartResize,
    clip_points,
)
from .grammar import Coded, DecodeError, Found, Grammar
from .guessing import Guess, guess_format
from .json_grammar import JsonGrammar
from .markup import MolmoGrammar
from .matching import Match, assign, match, match_regions, similarity
from .molmo2 import Molmo2Grammar
from .named_json import NamedJsonGrammar
from .numbers import NumberRule, Numbers
from .overlap import box_area, box_giou, box_iou, contains, inside_polygon, paired_box_iou
from .padded import PADDED, PairGrammar, padded_format
from .regions import KINDS, Region
from .streaming import StreamDecoder
from .table import ABSENT
from .tagged import Shape, TaggedGrammar

__all__ = [
    "ABSENT",
    "FORMATS",
    "KINDS",
    "PADDED",
    "PROBLEMS",
    "CellNumbers",
    "Coded",
    "CoordinateError",
    "CoordinateFormat",
    "DecodeError",
    "DecodeResult",
    "Detection",
    "FitWithin",
    "Found",
    "Frame",
    "FrameRule",
    "Grammar",
    "Guess",
    "ImageRegions",
    "JsonGrammar",
    "KosmosGrammar",
    "Match",
    "Molmo2Grammar",
    "MolmoGrammar",
    "NamedJsonGrammar",
    "NumberRule",
    "Numbers",
    "Original",
    "PaddedSquare",
    "PairGrammar",
    "Problem",
    "Region",
    "Report",
    "Resized",
    "Shape",
    "SmartResize",
    "StreamDecoder",
    "TaggedGrammar",
    "assign",
    "box_area",
    "box_giou",
    "box_iou",
    "check_boxes",
    "check_region",
    "check_text",
    "clip_points",
    "contains",
    "convert",
    "decode",
    "decode_array",
    "dequantize",
    "encode",
    "encode_array",
    "get_format",
    "guess_format",
    "inside_polygon",
    "match",
    "match_regions",
    "padded_format",
    "paired_box_iou",
    "quantize",
    "read_annotations",
    "read_coco",
    "record_regions",
    "register_format",
    "report",
    "similarity",
    "training_record",
    "write_annotations",
    "write_coco",
]
