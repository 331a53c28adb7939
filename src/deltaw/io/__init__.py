"""Adapters and files: every format, exact both ways, and nothing silent."""

from deltaw.io.admission import admit
from deltaw.io.convert import convert, read_any
from deltaw.io.digest import digest
from deltaw.io.doctor import doctor
from deltaw.io.extraction import extract
from deltaw.io.files import read, write
from deltaw.io.model_files import load, save
from deltaw.io.notices import AdapterNotice

__all__ = [
    "AdapterNotice",
    "admit",
    "convert",
    "digest",
    "doctor",
    "extract",
    "load",
    "read",
    "read_any",
    "save",
    "write",
]
