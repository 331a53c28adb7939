"""PEFT's folders: one file per `peft_type`, each a reader and a writer, found through `grammars`."""

from deltaw.io.peft.grammar import Grammar, Parsed, Shapes, grammar_for, grammar_of

__all__ = ["Grammar", "Parsed", "Shapes", "grammar_for", "grammar_of"]
