"""Text in, blocks of token ids out: documents, tokenizers, prepared token files."""
