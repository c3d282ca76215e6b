"""Weight sync through a folder: publishers and subscribers that come, die and come again."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


from deltafmt.errors import BehindError, InvalidFileError, StorageError, UsageError
from deltafmt.sync import Folder, Publisher, Subscriber
from sync_states import State, copied, equal, model, stepped


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_folder_leads_everybody_to_the_newest_version(place: str, tmp_path: Path) -> None:
    if place == "memory":
        pytest.importorskip("fsspec")
    folder = Folder(tmp_path / "run" if place == "local" else f"memory://{tmp_path.name}/run")
    publisher, states, lives = Publisher(anchor_every=3, ahead=20), [model()], [copied(model()) for _ in range(3)]
    early, late, lost = (Subscriber(live, f"s{number}") for number, live in enumerate(lives))
    for seed in range(1, 9):
        states.append(stepped(states[-1], seed))
        folder.send(publisher.publish(states[-1]))
        folder.follow(early)
        if seed < 3:
            folder.follow(lost)
        assert folder.collect(publisher) == {}
    assert equal(lives[0], states[-1])
    folder.prune()
    assert folder.versions() == [(4, "anchor"), (5, "patch"), (6, "patch"), (7, "anchor"), (8, "patch")]
    assert [reply.version for reply in folder.follow(late)] == [7, 8]  # the newest anchor, and what comes behind it
    assert [reply.version for reply in folder.follow(lost)] == [7, 8]  # 3 is gone
    assert folder.follow(lost) == []
    assert all(equal(live, states[-1]) for live in lives)
    assert folder.collect(publisher) == {}


def test_a_folder_answers_a_subscriber_that_cannot_follow(tmp_path: Path) -> None:
    folder, live = Folder(tmp_path), copied(model())
    publisher, subscriber = Publisher(), Subscriber(live, "one")
    folder.send(publisher.publish(model()))
    folder.follow(subscriber)
    assert folder.collect(publisher) == {}
    new = stepped(model(), 1)
    folder.send(publisher.publish(new))
    patch = tmp_path / "000000000002.patch.deltafmt"
    patch.write_bytes(patch.read_bytes()[:-1])
    (reply,) = folder.follow(subscriber)
    assert reply.error
    assert equal(live, model())
    assert list(folder.collect(publisher)) == ["one"]
    with pytest.raises(BehindError, match="cannot follow"):
        publisher.publish(new)
    assert [reply.error is None for reply in folder.follow(subscriber)] == [False, True]
    assert folder.collect(publisher) == {}
    assert equal(live, new)
    with pytest.raises(UsageError, match="a name in a folder"):
        folder.follow(Subscriber(live, "../x"))


def test_a_subscriber_that_was_dropped_stays_away_until_it_says_more(tmp_path: Path) -> None:
    folder, publisher, live = Folder(tmp_path), Publisher(), copied(model())
    dead = Subscriber(live, "dead")
    folder.send(publisher.publish(model()))
    folder.follow(dead)
    assert folder.collect(publisher) == {}
    folder.send(publisher.publish(stepped(model(), 1)))
    assert list(folder.collect(publisher)) == ["dead"]
    publisher.drop("dead")
    assert folder.collect(publisher) == {}  # its reply still lies there
    folder.send(publisher.publish(stepped(model(), 2)))
    assert folder.collect(publisher) == {}
    assert [reply.version for reply in folder.follow(dead)] == [2, 3]  # it was not dead
    assert folder.collect(publisher) == {}
    publisher.publish(stepped(model(), 3))
    assert list(publisher.behind()) == ["dead"]


def test_a_publisher_that_was_started_anew_counts_on_from_the_folder(tmp_path: Path) -> None:
    folder, old = Folder(tmp_path), Publisher()
    for seed in range(4):
        folder.send(old.publish(stepped(model(), seed)))
    publisher, state, live = Publisher(), stepped(model(), 9), copied(model())
    assert folder.collect(publisher) == {}
    folder.send(publisher.publish(state))
    assert folder.versions()[-1] == (5, "anchor")
    (reply,) = folder.follow(Subscriber(live, "late"))
    assert (reply.version, reply.error) == (5, None)
    assert equal(live, state)
    assert folder.collect(publisher) == {}
    publisher.count_on(50)  # it has a state, and goes on behind its own
    assert publisher.version == 5


def used_folder(place: Path) -> tuple[Folder, list[State]]:
    """Return a folder with three versions of a publisher that has died, and their states."""
    folder, old, states = Folder(place), Publisher(), [model()]
    for seed in range(3):
        states.append(stepped(states[-1], seed, 0.001))
        folder.send(old.publish(states[-1]))
    return folder, states[1:]


def test_a_publisher_with_a_base_counts_on_from_a_used_folder(tmp_path: Path) -> None:
    """It once wrote its version 1 over the older one, and subscribers met older patches behind it for ever."""
    folder, states = used_folder(tmp_path)
    publisher, new = Publisher(base=states[-1], subscribers=["here"], anchor_every=2), stepped(states[-1], 9, 0.001)
    assert folder.collect(publisher) == {}  # "here" has the base, and nothing to follow
    lives = {name: copied(states[start]) for name, start in (("here", 2), ("old", 0))}
    subscribers = [Subscriber(live, name) for name, live in lives.items()]
    first = publisher.publish(new)
    folder.send(first)
    assert (first.version, first.kind) == (4, "patch")
    for subscriber in subscribers:
        assert folder.follow(subscriber)[-1].error is None
    assert folder.collect(publisher) == {}
    publisher.count_on(50)
    assert publisher.version == 4
    for live in lives.values():
        assert equal(live, new)


def test_a_publisher_with_another_base_than_the_newest_version_of_a_folder(tmp_path: Path) -> None:
    folder, states = used_folder(tmp_path)
    live = copied(states[0])
    subscriber = Subscriber(live, "one")
    folder.follow(subscriber)
    publisher = Publisher(base=states[1])
    folder.collect(publisher)
    folder.follow(subscriber)
    assert (subscriber.version, folder.collect(publisher)) == (4, {})
    assert equal(live, states[1])
    new = stepped(states[1], 9, 0.001)
    folder.send(publisher.publish(new))
    assert folder.follow(subscriber)[-1].error is None
    assert equal(live, new)


def test_a_message_over_that_of_another_publisher_is_refused(tmp_path: Path) -> None:
    folder, states = used_folder(tmp_path)
    before = folder.read(1, "anchor")
    message = Publisher().publish(states[2])  # it has not collected
    with pytest.raises(UsageError, match=r"^0{11}1.anchor.deltafmt is here with other bytes, .*; collect before"):
        folder.send(message)
    assert folder.read(1, "anchor") == before
    other = Folder(tmp_path / "other")
    other.send(message)
    other.send(message)  # such as after a call that was interrupted
    assert other.read(1, "anchor") == message.data


def test_messages_that_are_pruned_while_they_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, publisher, live = Folder(tmp_path), Publisher(anchor_every=3, ahead=100), copied(model())
    states = [stepped(model(), seed) for seed in range(5)]
    for state in states:
        folder.send(publisher.publish(state))
    subscriber, read = Subscriber(live, "slow"), folder.read
    subscriber.apply(read(1, "anchor"))

    def prune_first(version: int, kind: str) -> bytes:
        if version == 3:
            folder.prune(keep_anchors=1)
        return read(version, kind)

    monkeypatch.setattr(folder, "read", prune_first)
    assert [(reply.version, reply.error) for reply in folder.follow(subscriber)] == [(2, None), (4, None), (5, None)]
    assert equal(live, states[-1])
    monkeypatch.undo()
    folder.send(publisher.publish(states[0]))
    (tmp_path / "000000000006.patch.deltafmt").unlink()
    (tmp_path / "000000000006.patch.deltafmt").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        folder.follow(subscriber)


def test_a_damaged_reply_is_named(tmp_path: Path) -> None:
    folder, publisher = Folder(tmp_path), Publisher()
    folder.send(publisher.publish(model()))
    (tmp_path / "one.reply.json").write_bytes(b"{")
    with pytest.raises(InvalidFileError, match=r"one\.reply\.json: not a reply of a subscriber"):
        folder.collect(publisher)
