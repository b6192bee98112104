"""Decode a whole packed model natively on a CPU; `decoder.Decoder` is the way in. transformers is not needed."""
