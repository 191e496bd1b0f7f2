"""Text in and out: tokenizer, chat template, streaming detokenization, stop strings."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["ChatTemplate", "StopStrings", "StreamDecoder", "Text"]

# Imported on first use: a chat template alone does not load the tokenizers library.
__getattr__ = lazily(
    __name__,
    {
        "ChatTemplate": "dynexport.runtime.text.chat_template",
        "StopStrings": "dynexport.runtime.text.text",
        "StreamDecoder": "dynexport.runtime.text.text",
        "Text": "dynexport.runtime.text.text",
    },
)
