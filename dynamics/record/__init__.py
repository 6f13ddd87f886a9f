"""The record on disk: rows are buffered, written by a thread, committed whole; and opened again, by anyone, safely."""
