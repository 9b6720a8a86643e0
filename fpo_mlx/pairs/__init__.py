"""From prompts to preference pairs: candidates and verdicts as files, judges, and what is built."""
