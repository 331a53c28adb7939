"""sft: teach a small chat model a way of answering. SmolLM2-135M (arXiv:2502.02737) on chatterbot's dialogues, or yours.

Rows may be messages, prompt + completion, alpaca or sharegpt. `deltaw chat RUN` talks to the base and the adapter side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaw.recipes.recipe import Recipe, register
from deltaw.training.config import RunConfig, Section

if TYPE_CHECKING:
    from deltaw.training.task import Task


class Options(Section):
    """The section `sft`."""

    packing: bool = Field(
        True, description="several conversations in a row of max_length tokens; false: batches of similar length"
    )
    before: bool = Field(True, description="score the base before training")


def task(config: RunConfig) -> Task:
    """The task with its data."""
    from deltaw.training.tasks.causal_lm import CausalLM

    options = Options.model_validate(config.options)
    return CausalLM(config, packing=options.packing, before=options.before)


def kept(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """The task of a kept run, without data."""
    from deltaw.training.tasks.causal_lm import CausalLM

    return CausalLM(config, read="no")


def scored(config: RunConfig, facts: Mapping[str, Any], other: bool) -> Task:
    """The task with data."""
    from deltaw.training.tasks.causal_lm import CausalLM

    options = Options.model_validate(config.options)
    return CausalLM(config, packing=options.packing, before=False, read="whole" if other else "splits")


register(
    Recipe(
        name="sft",
        about="conversations: a causal language model learns to answer like them (messages, alpaca, sharegpt ...)",
        task=task,
        kept=kept,
        scored=scored,
        options=Options,
        methods=("base", "lora", "dora", "full"),
        defaults={
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "data": {"path": "chatterbot-corpus", "validation": 0.1, "test": 0.1},
            "max_length": 256,
            "epochs": 3,
            "batch_size": 4,
            "eval_batch_size": 4,
            "lr": {"full": 2e-5, "default": 5e-4},
            "lora": {"rank": 8, "alpha": 16},
        },
    )
)
