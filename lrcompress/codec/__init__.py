"""Bytes on disk <-> artefact."""

from lrcompress.codec.artefact import Artefact, Stored, read_plan, reading, storable, write

__all__ = ["Artefact", "Stored", "read_plan", "reading", "storable", "write"]
