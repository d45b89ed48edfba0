"""Whether the Hugging Face hub can be reached: one quick question, instead of a minute of its client's retries."""

from __future__ import annotations


def hub_answers(seconds: float = 5.0) -> bool:
    """True where the hub answers at all; False offline, or where HF_HUB_OFFLINE says to be."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # the tree of connection errors belongs to the client, which has changed it between versions
        return False
    return True
