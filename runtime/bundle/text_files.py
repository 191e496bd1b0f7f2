"""Names of a bundle's tokenizer and chat template files; engines do not depend on them."""

from __future__ import annotations

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE)
