"""Loading TensorFlow where a person watches."""

from __future__ import annotations

import os
import sys
import tempfile


def load_quietly() -> None:
    """Imports TensorFlow and Keras without their start-up chatter, which no setting turns off.

    It swaps the process's standard error for a moment, so it is for command lines only. What a
    failing import had to say is shown.
    """
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            tf.config.list_physical_devices()  # looks for GPUs, aloud
        except BaseException:
            chatter.seek(0)
            os.write(kept, chatter.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
