"""Regions of images as text: published formats, frames and metrics. Requires neither torch nor transformers."""

from .arrays import decode_array, dequantize, encode_array, quantize
from .checking import PROBLEMS, Problem, check_region, check_text
from .codec import CoordinateError, DecodeResult, decode, encode
from .conversion import convert
from .formats.detection import Guess, guess_format
from .formats.openpangu import PADDED, padded_format
from .formats.published import ABSENT
from .formats.registry import FORMATS, CoordinateFormat, as_seen, get_format, register_format
from .frames.maps import Frame, clip_points
from .frames.processed import Processed
from .frames.rules import FitWithin, FrameRule, Original, PaddedSquare, Resized, SmartResize
from .grammars.base import Coded, DecodeError, Found, Grammar, Suspicion
from .grammars.json_fields import NamedJsonGrammar
from .grammars.json_objects import JsonGrammar
from .grammars.kosmos2 import CellNumbers, KosmosGrammar
from .grammars.molmo import MolmoGrammar
from .grammars.molmo2 import Molmo2Grammar
from .grammars.openpangu import PairGrammar
from .grammars.tagged import Shape, TaggedGrammar
from .io.annotations import ImageRegions, read_annotations, record_regions, training_record, write_annotations
from .io.coco import CocoImages, read_coco, write_coco
from .io.label_studio import read_label_studio
from .io.via import read_via
from .metrics.iou import box_area, box_giou, box_iou, contains, inside_polygon, paired_box_iou
from .metrics.matching import Match, assign, match, match_regions, similarity
from .metrics.report import Detection, Report, report
from .quantization import NumberRule, Numbers
from .regions import KINDS, Region
from .streaming import StreamDecoder
from .suspicion import CoordinateWarning
from .validation import check_boxes

__all__ = [
    "ABSENT",
    "FORMATS",
    "KINDS",
    "PADDED",
    "PROBLEMS",
    "CellNumbers",
    "CocoImages",
    "Coded",
    "CoordinateError",
    "CoordinateFormat",
    "CoordinateWarning",
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
    "Processed",
    "Region",
    "Report",
    "Resized",
    "Shape",
    "SmartResize",
    "StreamDecoder",
    "Suspicion",
    "TaggedGrammar",
    "as_seen",
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
    "read_label_studio",
    "read_via",
    "record_regions",
    "register_format",
    "report",
    "similarity",
    "training_record",
    "write_annotations",
    "write_coco",
]
