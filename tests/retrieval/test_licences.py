"""What a licence permits, and that silence permits nothing."""

import pytest

from compose.errors import LibraryError
from compose.retrieval.licences import civitai_licence, licence_id, permits


@pytest.mark.parametrize(
    ("licence", "commercial", "share", "modify"),
    [
        ("apache-2.0", True, True, True),
        ("CC-BY-4.0", True, True, True),
        ("Apache License 2.0", True, True, True),
        ("cc-by-nc-4.0", False, True, True),
        ("cc-by-nd-4.0", True, True, False),
        ("flux-1-dev-non-commercial-license", False, True, True),
        ("creativeml-openrail-m", True, True, True),
        ("unknown", False, False, False),
        ("", False, False, False),
        ("ask me first", False, False, False),
    ],
)
def test_the_table(licence, commercial, share, modify):
    assert [permits(licence, use) for use in ("commercial", "share", "modify")] == [commercial, share, modify]


def test_no_stated_use_permits_all():
    assert permits("unknown", None)
    assert permits("unknown", "any")


def test_an_unknown_use_is_an_error():
    with pytest.raises(LibraryError, match="did you mean commercial"):
        permits("mit", "comercial")


@pytest.mark.parametrize(
    ("boxes", "uses"),
    [
        ((["Image", "Rent", "Sell"], True, True), {"commercial", "share", "modify"}),
        ((["Image", "Rent"], True, False), {"commercial"}),
        ((["Image"], False, True), set()),
        (("{Image,RentCivit}", True, True), {"modify"}),
        (("None", False, False), set()),
        ((None, None, None), set()),
    ],
)
def test_civitai_boxes(boxes, uses):
    licence = civitai_licence(*boxes)
    assert {use for use in ("commercial", "share", "modify") if permits(licence, use)} == uses
    assert licence_id(licence) == licence
