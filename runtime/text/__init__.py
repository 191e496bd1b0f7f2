"""Text in and out: tokenizer, chat template, streamed decoding, stop strings."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["ChatTemplate", "StopStrings", "StreamDecoder", "Text"]

# Imported when asked for: a stop string needs no tokenizer.
__getattr__ = lazily(
    __name__,
    {
        "ChatTemplate": "dynexport.runtime.text.chat_template",
        "StopStrings": "dynexport.runtime.text.text",
        "StreamDecoder": "dynexport.runtime.text.text",
        "Text": "dynexport.runtime.text.text",
    },
)
