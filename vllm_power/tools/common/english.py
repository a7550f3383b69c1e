"""English text that every Python installation contains."""


def english_text() -> str:
    """Return about 450,000 characters of prose and code: the language reference behind Python's help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
