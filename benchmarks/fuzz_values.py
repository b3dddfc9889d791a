"""What nobody expects in a value or in a file: the hostile draws that kinds share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Draw = Any
ODD_TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "a\ud83d",
    "\ufeff",
    "\u202e",
    "\r",
    "\n\n",
    "a" * 70_000,
    "é" * 300,
    "\u0345" * 99,
    "</s>",
    "<s>",
    "[CLS]",
    "[PAD]",
    "{{ x }}",
    "{% for %}",
    "nan",
    "NaN",
    "1e999",
    "../../x",
    "/etc/passwd",
    "~",
    "*",
    "**/*",
    "[",
    "B-",
    "I-x",
    "O",
    "B",
    "-",
    "user",
    "null",
    "0",
    "𝕊𝕠",
    "\x1b[31m",
    "%s%n",
    "-1",
    "org/name",
    "a:b:c",
    "http://x",
    "auto",
    "all",
    "never",
    "lora",
    "true",
    ".",
    "..",
    "\ue000stand-in\ue000",
)
ODD = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e308, -0.0, 5e-324, float("nan"), float("inf"), 0.5]),
    st.text(max_size=20),
    st.floats(),
)
NESTED = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=8)), inner, max_size=4),
    ),
    max_leaves=6,
)


def spoilt_bytes(draw: Draw, content: bytes) -> bytes:
    """Bytes cut, doubled, flipped, or with others put between."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        what = draw(st.sampled_from(("cut", "flip", "insert", "drop", "bom", "cr", "double", "utf16")))
        if what == "cut":
            content = content[:at]
        elif what == "flip":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif what == "insert":
            content = (
                content[:at]
                + draw(
                    st.one_of(
                        st.binary(max_size=8),
                        st.sampled_from(
                            (
                                b"\x00",
                                b"\xff",
                                b'"',
                                b"\n",
                                b"\r",
                                b"{",
                                b"}",
                                b"[" * 3000,
                                b'{"a":' * 3000,
                                b"\xed\xa0\x80",
                                b"NaN",
                                b"\\ud800",
                                b",",
                                b"\t",
                                b"9" * 5000,
                            )
                        ),
                    )
                )
                + content[at:]
            )
        elif what == "drop":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        elif what == "bom":
            content = b"\xef\xbb\xbf" + content
        elif what == "cr":
            content = content.replace(b"\n", draw(st.sampled_from((b"\r", b"\r\n", b"\n\n"))))
        elif what == "double":
            content += content[:at]
        else:
            content = content.decode("utf-8", "replace").encode("utf-16")
    return content
