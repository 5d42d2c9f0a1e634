"""The sections of `config.RunConfig`, by subject."""
