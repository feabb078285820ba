"""Filters of training records by a language model: perplexity, and questions answered without the image."""

from .answers import generate_answers, is_same_answer
from .output import FilterSummary
from .perplexity import Perplexity, compute_perplexities, select_lowest
from .run import filter_records, load_language_model
from .texts import Question, read_questions, scored_text

__all__ = [
    "FilterSummary",
    "Perplexity",
    "Question",
    "compute_perplexities",
    "filter_records",
    "generate_answers",
    "is_same_answer",
    "load_language_model",
    "read_questions",
    "scored_text",
    "select_lowest",
]
