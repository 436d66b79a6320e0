"""The package's logger: a prefix, standard error, and the verbosity of Transformers.

`transformers.logging.set_verbosity_error()` or `TRANSFORMERS_VERBOSITY=error` keep info and warnings back. Where the
application has configured logging, its handlers print.
"""

import logging
import sys

logger = logging.getLogger("hf_fused_mlp")


def _is_verbose_enough(record: logging.LogRecord) -> bool:
    """True if Transformers shows warnings: its default hides info, and this package has a line of that for a model."""
    get_verbosity = getattr(sys.modules.get("transformers.utils.logging"), "get_verbosity", None)
    return get_verbosity is None or max(record.levelno, logging.WARNING) >= get_verbosity()


def _is_last_resort(record: logging.LogRecord) -> bool:
    return not logging.getLogger().handlers


def configure() -> None:
    """Gives the logger a level and a handler; `import hf_fused_mlp` calls this. What an application set stays."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[hf_fused_mlp] %(message)s"))
        handler.addFilter(_is_last_resort)
        logger.addHandler(handler)
    logger.addFilter(_is_verbose_enough)
