"""Expert parallelism of grouped experts: every process holds whole groups."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


def check_whole_groups(config: PreTrainedConfig, distributed_config: Any) -> None:
    """Check that expert parallelism divides no group of experts.

    A token chooses equally many experts of each group (arXiv 2505.21411, section 2.2), so that processes with whole
    groups all have the same work. With parts of groups they would wait for each other.

    Args:
        config: Configuration of a model; with `num_expert_groups` in its text part, it is checked.
        distributed_config: transformers' `DistributedConfig`, or None.

    Raises:
        ValueError: If `ep_size` does not divide `num_expert_groups`.
    """
    groups = getattr(config.get_text_config(), "num_expert_groups", None)
    processes = getattr(distributed_config, "ep_size", None) or 1
    if groups is not None and groups % processes:
        raise ValueError(
            f"`ep_size` must divide `num_expert_groups`, {groups}, so that every process holds whole groups, got "
            f"{processes}."
        )
