"""Files of other tools: one file per format, each a reader and a writer, found through `formats`."""

from deltaw.io.formats.format import Format, Hints, format_named, formats, guess

__all__ = ["Format", "Hints", "format_named", "formats", "guess"]
