"""Two conversations at once: the same questions to a fine-tuned language model and to its base."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltaw.errors import ConfigError
from deltaw.model.activate import disabled
from deltaw.recipes.kept import described, open_kept
from deltaw.recipes.start import with_base
from deltaw.training.conversations import Conversation
from deltaw.training.tasks.causal_lm import CausalLM

BASE, TUNED = "base", "adapter"


class Talk:
    """A conversation with the result in `folder`; unless `alone`, its base hears the same questions and gives its own answers.

    Raises:
        ConfigError: the result is not of a language model. Others as `open_kept`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str | None = None,
        system: str | None = None,
        alone: bool = False,
        max_new: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        _, task, self.model = open_kept(folder, model)
        if not isinstance(task, CausalLM):
            raise ConfigError(f"{folder} is a result of {type(task).__name__}, not a language model that can talk")
        self.task = task
        self.max_new, self.temperature, self.seed = max_new, temperature, seed
        self.whole = (folder / "model").is_dir()
        self.other: nn.Module | None = None
        if self.whole and not alone:
            config, _ = described(folder)
            config = config.model_copy(update={"model": model or config.model})
            self.other = CausalLM(with_base(config, folder), read="no").build().eval()
        opening: Conversation = [{"role": "system", "content": system}] if system else []
        self.heard: dict[str, Conversation] = {name: list(opening) for name in ([TUNED] if alone else [BASE, TUNED])}

    def say(self, text: str) -> dict[str, str]:
        """Each speaker's answer to `text`, given what it has heard and said so far."""
        answers = {}
        for name, talk in self.heard.items():
            talk.append({"role": "user", "content": text})
            answers[name] = self._base(talk) if name == BASE else self._answer(self.model, talk)
            talk.append({"role": "assistant", "content": answers[name]})
        return answers

    def _base(self, talk: Conversation) -> str:
        if self.other is not None:
            return self._answer(self.other, talk)
        with disabled(self.model):
            return self._answer(self.model, talk)

    def _answer(self, model: nn.Module, talk: Conversation) -> str:
        return self.task.answer(model, talk, max_new=self.max_new, temperature=self.temperature, seed=self.seed)
