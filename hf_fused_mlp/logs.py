"""The package's logger: it prints to standard error with a prefix, at the verbosity of Transformers.

`transformers.logging.set_verbosity_error()` and `TRANSFORMERS_VERBOSITY=error` hide info and warnings. If the
application has configured logging, its handlers print.
"""

import logging
import sys

logger = logging.getLogger("hf_fused_mlp")


def _is_verbose_enough(record: logging.LogRecord) -> bool:
    """True if Transformers shows warnings. This package then shows info too, one line per model."""
    get_verbosity = getattr(sys.modules.get("transformers.utils.logging"), "get_verbosity", None)
    return get_verbosity is None or max(record.levelno, logging.WARNING) >= get_verbosity()


def _is_last_resort(record: logging.LogRecord) -> bool:
    return not logging.getLogger().handlers


def configure() -> None:
    """Sets the logger's level and handler, unless the application has set them. `import hf_fused_mlp` calls this."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[hf_fused_mlp] %(message)s"))
        handler.addFilter(_is_last_resort)
        logger.addHandler(handler)
    logger.addFilter(_is_verbose_enough)
