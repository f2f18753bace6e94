"""Which uses a licence permits, as far as its name tells: a short table, and 'not permitted' where it is silent.

The table is help for sorting, not legal advice: each entry says what the licence grants without further terms to
negotiate, and anything that depends on revenue, place or field of use counts as not granted.
"""

from __future__ import annotations

from compose.errors import LibraryError, unknown

USES: dict[str, str] = {
    "commercial": "use the adapter and its pictures in paid work",
    "share": "pass the adapter file on to others",
    "modify": "merge or change the adapter and pass the result on",
}

_ALL = frozenset(USES)
_GRANTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "wtfpl", "0bsd"),
        _ALL,
    ),
    **dict.fromkeys(("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "pddl", "odc-by"), _ALL),
    **dict.fromkeys(
        ("cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0"), _ALL
    ),
    # RAIL licences pass their list of forbidden purposes on, but permit selling, sharing and changing.
    **dict.fromkeys(
        ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "faipl-1.0"), _ALL
    ),
    **dict.fromkeys(("cc-by-nd-3.0", "cc-by-nd-4.0"), frozenset({"commercial", "share"})),
    **dict.fromkeys(("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"), frozenset({"share", "modify"})),
    **dict.fromkeys(("cc-by-nc-nd-4.0",), frozenset({"share"})),
    # FLUX.1 [dev]: pictures may be sold, the weights may not be used in a service; so not a plain yes.
    **dict.fromkeys(("flux-1-dev-non-commercial-license",), frozenset({"share", "modify"})),
    # Stability's community licence ends above a yearly revenue: not a plain yes.
    **dict.fromkeys(("stabilityai-community", "stabilityai-ai-community"), frozenset({"share", "modify"})),
}
_SPELLINGS = {
    "apache 2.0": "apache-2.0",
    "apache license 2.0": "apache-2.0",
    "apache2": "apache-2.0",
    "apache-2": "apache-2.0",
    "mit license": "mit",
    "cc0": "cc0-1.0",
    "cc by 4.0": "cc-by-4.0",
    "public domain": "cc0-1.0",
    "gpl-3.0-only": "gpl-3.0",
    "gpl-3.0-or-later": "gpl-3.0",
    "agpl-3.0-only": "agpl-3.0",
    "agpl-3.0-or-later": "agpl-3.0",
    "creativeml open rail-m": "creativeml-openrail-m",
    "openrail-m": "openrail",
    "faipl-1.0-sd": "faipl-1.0",
}
UNKNOWN = "unknown"
LISTED = (
    "uses:"  # a licence id such as "uses:commercial,share" lists what its owner ticked (model sites do so)
)


def licence_id(text: str) -> str:
    """The table's spelling of a licence name; an empty name is 'unknown', a strange one stays as it is."""
    plain = " ".join(text.strip().lower().split())
    return _SPELLINGS.get(plain, plain) or UNKNOWN


def permits(licence: str, use: str | None) -> bool:
    """Whether `licence` permits `use` (a key of `USES`; None or 'any' asks for nothing).

    Raises LibraryError for an unknown use. A licence that the table does not know permits no stated use.
    """
    if use is None or use == "any":
        return True
    if use not in USES:
        raise LibraryError(unknown("use", use, ["any", *USES]))
    name = licence_id(licence)
    if name.startswith(LISTED):
        return use in name.removeprefix(LISTED).split(",")
    return use in _GRANTS.get(name, frozenset())


def civitai_licence(commercial: object, derivatives: object, other_licence: object) -> str:
    """The licence id that Civitai's tick boxes amount to.

    `commercial` is its list (or text) of 'None', 'Image', 'Rent', 'RentCivit', 'Sell'; `derivatives` and
    `other_licence` its booleans. Selling pictures and running a paid service must both be ticked for 'commercial'.
    """
    ticked = (
        commercial if isinstance(commercial, (list, tuple)) else str(commercial or "").strip("{}").split(",")
    )
    uses = []
    if {"Image", "Rent"} <= set(ticked) or "Sell" in ticked:
        uses.append("commercial")
    if "Sell" in ticked:
        uses.append("share")
    if derivatives is True and other_licence is True:
        uses.append("modify")
    return LISTED + ",".join(uses)
