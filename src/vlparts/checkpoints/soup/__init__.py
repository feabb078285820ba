"""Model soups: the mean of the weights of several fine-tuned models, and the greedy choice of them."""

from .averaging import average_folders
from .comparison import MAY_DIFFER, check_folders
from .greedy import GreedySoup, Trial, command_evaluator, greedy_soup

__all__ = [
    "MAY_DIFFER",
    "GreedySoup",
    "Trial",
    "average_folders",
    "check_folders",
    "command_evaluator",
    "greedy_soup",
]
