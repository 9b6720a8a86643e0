"""Pure array functions: no model, no files, no settings objects."""
