"""The queue: order, cancelling, limits, owners, and what a restart finds."""

import json
import threading
import time

import pytest

from compose.app.jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Busy, Jobs, Limits, NoJob
from compose.errors import AdapterError, RequestError


class Easel:
    """Work that is done when the test says so."""

    def __init__(self):
        self.begun, self.go, self.drawn = threading.Event(), threading.Event(), []

    def __call__(self, task):
        self.begun.set()
        while not self.go.wait(0.005):
            task.check()
        if "fault" in task.payload:
            raise {"ours": ZeroDivisionError("oops, secret path"), "theirs": AdapterError("no such adapter")}[
                task.payload["fault"]
            ]
        task.picture(0).write_bytes(task.payload["name"].encode())
        task.drawn()
        self.drawn.append(task.payload["name"])


@pytest.fixture
def easel():
    return Easel()


@pytest.fixture
def jobs(tmp_path, easel):
    made = Jobs(tmp_path / "jobs", {"mini": easel}, Limits(waiting=3, kept=5))
    yield made
    made.close()


def submit(jobs, name="a", owner="me", lane="mini", **payload):
    return jobs.submit(lane, owner, {"name": name, **payload}, title=name)


def test_jobs_are_drawn_in_order_and_leave_their_own_pictures(jobs, easel):
    made = [submit(jobs, name) for name in "abc"]
    easel.go.set()
    assert all(jobs.wait(job, 5) for job in made)
    assert easel.drawn == ["a", "b", "c"]
    assert [jobs.pictures(job)[0].read_text() for job in made] == ["a", "b", "c"]
    assert {job.state for job in made} == {DONE}
    assert not list(jobs.folder.glob("*/order.json"))


def test_positions_count_what_comes_before(jobs, easel):
    first = submit(jobs)
    assert easel.begun.wait(5)
    later = [submit(jobs, name) for name in "bcd"]
    assert first.state == RUNNING
    assert [jobs.position(job) for job in (first, *later)] == [0, 1, 2, 3]
    jobs.cancel(later[0].id)
    assert [jobs.position(job) for job in later] == [0, 1, 2]


def test_a_full_queue_says_so_and_takes_again_later(jobs, easel):
    submit(jobs)
    assert easel.begun.wait(5)
    waiting = [submit(jobs, name) for name in "bcd"]
    with pytest.raises(Busy, match="3 jobs wait"):
        submit(jobs, "e")
    jobs.cancel(waiting[0].id)
    assert submit(jobs, "e").state == WAITING


def test_cancelling_a_waiting_job_never_starts_it(jobs, easel):
    submit(jobs)
    assert easel.begun.wait(5)
    job = submit(jobs, "b")
    jobs.cancel(job.id)
    assert job.state == CANCELLED
    easel.go.set()
    assert jobs.wait(submit(jobs, "c"), 5)
    assert "b" not in easel.drawn


def test_cancelling_a_running_job_ends_it_at_its_next_report(jobs, easel):
    job = submit(jobs)
    assert easel.begun.wait(5)
    jobs.cancel(job.id)
    assert jobs.wait(job, 5)
    assert (job.state, job.error, easel.drawn) == (CANCELLED, None, [])
    jobs.cancel(job.id)  # an ended job stays as it is
    assert job.state == CANCELLED


def test_faults_of_users_are_told_and_faults_of_ours_are_only_logged(jobs, easel, caplog):
    easel.go.set()
    theirs, ours = submit(jobs, fault="theirs"), submit(jobs, fault="ours")
    assert jobs.wait(theirs, 5) and jobs.wait(ours, 5)
    assert (theirs.state, theirs.error) == (FAILED, "no such adapter")
    assert ours.state == FAILED
    assert "internal error" in ours.error and "secret" not in ours.error
    assert "oops, secret path" in caplog.text
    after = submit(jobs, "next")
    assert jobs.wait(after, 5) and after.state == DONE


def test_owners_see_their_own_jobs_only(jobs, easel):
    mine, yours = submit(jobs, "mine"), submit(jobs, "yours", owner="you")
    assert jobs.of("me") == [mine]
    with pytest.raises(NoJob):
        jobs.get(yours.id, "me")
    with pytest.raises(NoJob):
        jobs.cancel(yours.id, "me")
    assert yours.state in (WAITING, RUNNING)


def test_lanes_run_beside_each_other(tmp_path):
    first, second = Easel(), Easel()
    jobs = Jobs(tmp_path, {"a": first, "b": second})
    submit(jobs, lane="a")
    other = submit(jobs, lane="b")
    assert first.begun.wait(5) and second.begun.wait(5)
    second.go.set()
    assert jobs.wait(other, 5) and not first.drawn
    with pytest.raises(RequestError, match="no queue for 'c'; choose a, b"):
        submit(jobs, lane="c")
    jobs.close()


def test_listeners_hear_of_every_change_until_they_leave(tmp_path):
    heard = []
    go = threading.Event()

    def work(task):
        go.wait(5)
        task.progress("denoising", 0, 4)
        task.progress("denoising", 1, 4)
        task.tell(seed=7)

    jobs = Jobs(tmp_path, {"mini": work})
    job = submit(jobs)
    leave = jobs.listen(job, lambda: heard.append((job.state, job.done, dict(job.facts))))
    go.set()
    assert jobs.wait(job, 5)
    leave()
    assert ("running", 1, {}) in heard
    assert any(facts == {"seed": 7} for _, _, facts in heard)
    data = jobs.as_data(job)
    assert (data["facts"], data["base"], data["position"]) == ({"seed": 7}, "mini", 0)
    assert "owner" not in data
    assert not jobs._listeners
    jobs.close()


def test_the_time_left_follows_from_the_steps_so_far(jobs, easel):
    job = submit(jobs)
    job.state, job.done, job.total, job.stage_begun = RUNNING, 2, 10, time.time() - 1
    assert 3.5 < job.seconds_left < 4.5
    job.done = 0
    assert job.seconds_left is None


def test_a_restart_finds_what_was_finished_and_says_what_was_not(tmp_path):
    easel = Easel()
    jobs = Jobs(tmp_path, {"mini": easel})
    easel.go.set()
    done = submit(jobs, "kept")
    assert jobs.wait(done, 5)
    jobs._lock.release()  # as a killed process would
    half = tmp_path / "half"
    half.mkdir()
    (half / "job.json").write_text(
        json.dumps(
            json.loads((tmp_path / done.id / "job.json").read_text()) | {"id": "half", "state": RUNNING}
        )
    )
    (half / ".0.png.x.part").write_text("half a picture")
    (tmp_path / "stray").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "job.json").write_text("{")

    again = Jobs(tmp_path, {"mini": easel})
    found = again.get(done.id, "me")
    assert (found.state, again.pictures(found)[0].read_text()) == (DONE, "kept")
    assert again.get("half").state == FAILED
    assert "stopped before" in again.get("half").error
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted([done.id, "half"])
    assert list(half.iterdir()) == [half / "job.json"]
    again.close()


def test_two_servers_do_not_share_a_folder(jobs):
    with pytest.raises(RequestError, match="another server keeps its jobs"):
        Jobs(jobs.folder, {})


def test_the_oldest_results_make_room(jobs, easel):
    easel.go.set()
    made = []
    for number in range(7):
        made.append(submit(jobs, str(number)))
        assert jobs.wait(made[-1], 5)
    deadline = time.time() + 5
    while len(jobs.of("me")) > 5 and time.time() < deadline:
        time.sleep(0.01)
    assert [job.title for job in jobs.of("me")] == ["6", "5", "4", "3", "2"]
    assert not (jobs.folder / made[0].id).exists()


def test_removing_a_running_job_stops_it_and_leaves_nothing(jobs, easel):
    job = submit(jobs)
    assert easel.begun.wait(5)
    jobs.remove(job.id, "me")
    assert not (jobs.folder / job.id).exists()
    with pytest.raises(NoJob):
        jobs.get(job.id)


def test_closing_stops_everything_and_takes_no_more(tmp_path):
    easel = Easel()
    jobs = Jobs(tmp_path, {"mini": easel})
    made = [submit(jobs, name) for name in "ab"]
    assert easel.begun.wait(5)
    jobs.close()
    assert {job.state for job in made} == {CANCELLED}
    with pytest.raises(Busy):
        submit(jobs)
