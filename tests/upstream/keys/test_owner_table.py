"""Who made which object, in the memory of one process."""

from __future__ import annotations

from proxy.upstream.keys.owner_table import KEPT_FOR, MAX_OBJECTS, Owner, OwnerTable, digest_of, maker_of

DAY = 86_400.0


def test_an_owner_is_known_for_thirty_days() -> None:
    owners = OwnerTable()
    assert owners.record("1", "anna", 0.0)
    assert not owners.record("1", "anna", 3600.0)  # no news
    assert owners.record("1", "anna", 3 * DAY)  # told again, so that it is kept elsewhere, too
    assert owners.get("1", 3 * DAY + KEPT_FOR - 1) == "anna"
    assert owners.get("1", 3 * DAY + KEPT_FOR) is None
    assert owners.record("1", "ben", 3 * DAY)
    assert owners.get("2", 0.0) is None


def test_a_known_owner_can_be_kept() -> None:
    owners = OwnerTable()
    assert owners.record("1", "anna", 0.0, only_new=True)
    assert not owners.record("1", "ben", 1.0, only_new=True)
    assert owners.get("1", 1.0) == "anna"
    assert owners.record("1", "ben", KEPT_FOR + 1, only_new=True)  # who it was is forgotten
    assert owners.get("1", KEPT_FOR + 1) == "ben"


def test_memory_is_bounded() -> None:
    owners = OwnerTable()
    for number in range(MAX_OBJECTS + 5):
        owners.record(str(number), "k", 0.0)
    assert owners.get("4", 0.0) is None
    assert owners.get("5", 0.0) == "k"


def test_an_owner_is_a_text() -> None:
    for owner in (Owner("m"), Owner("m", "anna", "name anna"), Owner("m", "", "credential 1")):
        assert Owner.from_text(owner.text()) == owner


def test_a_maker_tells_upstream_and_key_apart_and_names_neither() -> None:
    one = maker_of("https://a.test/v1", "sk-1", "", "")
    assert one == maker_of("https://a.test/v1/", "sk-1", "", "")
    others = [
        maker_of("https://b.test/v1", "sk-1", "", ""),
        maker_of("https://a.test/v1", "sk-2", "", ""),
        maker_of("https://a.test/v1", "sk-1", "org", ""),
        maker_of("https://a.test/v1", "sk-1", "", "org"),
    ]
    assert len({one, *others}) == 5
    assert [other.partition("-")[0] == one.partition("-")[0] for other in others] == [False, True, True, True]
    assert "sk-1" not in one
    assert digest_of("vs_\ud800") != digest_of("vs_")
