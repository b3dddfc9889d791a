"""Rows to tokenised examples to the deterministic batch plan. The only room that imports datasets."""
