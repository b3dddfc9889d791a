"""Results become words, tables and pages: the closing lines of a run, its page, and several runs side by side."""
