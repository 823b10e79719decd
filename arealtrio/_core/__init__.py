"""The compiled islands; their sources are in ``_core/`` at the project's root."""
