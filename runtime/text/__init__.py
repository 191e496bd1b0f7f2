"""Text in and out: tokenizer, chat template, streamed decoding, stop strings."""
