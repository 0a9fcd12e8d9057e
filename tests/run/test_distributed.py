"""Several processes: they do what one does with all their images, under both launchers, and stop together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch as th
import torch.distributed
from conftest import SCRIPTS, TINY_FLAGS
from PIL import Image
from training_process import PATIENCE, Training, _context, one_host, rows, run_training, two_ranks

from improved_diffusion import dist_util
from improved_diffusion.jobs.script import run_script
from improved_diffusion.pictures import save_samples
from improved_diffusion.run import checkpoint, heartbeat
from improved_diffusion.run.interrupts import Interrupts

pytestmark = pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="this torch has no gloo")

# Everything that draws random numbers or depends on the batch: 4 timesteps fill the sampler's history at once,
# and microbatches of 3 divide neither 4 images nor 8.
FLAGS = [
    "--microbatch",
    3,
    "--log_interval",
    2,
    "--save_interval",
    5,
    "--random_flip",
    "True",
    "--lr",
    "1e-4",
]
FLAGS += ["--class_cond", "True", "--learn_sigma", "True", "--ema_rate", "0.9", "--diffusion_steps", 4]
FLAGS += ["--schedule_sampler", "loss-second-moment", "--skip_nonfinite", 1]
# In 16 bits, other sums would be rounded a hundred times as coarsely.
FLAGS += ["--precision", "fp32"]
STEPS = 12
WHOLE, HALF = ["--batch_size", 8], ["--batch_size", 4]
ENDLESS = [*HALF, "--total_steps", 10**6, "--save_interval", 10**6]
MPIEXEC = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(MPIEXEC is None, reason='no mpiexec: pip install -e ".[mpi]"')


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options)]


def command(script, *flags):
    return [sys.executable, str(SCRIPTS / script), *map(str, flags)]


def training_command(folder, *flags):
    data = ["--data_dir", "builtin", "--log_dir", folder]
    return command("image_train.py", *data, *TINY_FLAGS, *FLAGS, *flags)


def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process, which all others are compared with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_training(folder, *FLAGS, *WHOLE, "--total_steps", STEPS)
    return folder


def assert_same_path(folder, reference, step=STEPS):
    """The same weights, averages, optimizer state, sampler history and rows, up to the rounding of float32."""
    assert_same_state(folder, reference, step)
    for row, expected in zip(rows(folder), rows(reference), strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert (row[name] == value == "") or float(row[name]) == pytest.approx(float(value), rel=1e-4), (
                name
            )


def assert_same_state(folder, reference, step):
    a, b = (checkpoint.read(str(path), step) for path in (folder, reference))
    for kind in ("model", "opt", *b.ema_rates):
        x, y = (th.cat(list(numbers(c.load(kind)))) for c in (a, b))
        # Of the norm of everything: the gradient of a bias before a normalisation is nothing but rounding,
        # of which AdamW makes full steps.
        assert (x - y).norm() < 1e-4 * y.norm(), kind
    assert a.state["samples"] == b.state["samples"] == 8 * step
    histories = [c.state["schedule_sampler"] for c in (a, b)]
    assert histories[0]["counts"] == histories[1]["counts"] == [10] * 4
    assert np.allclose(*(history["losses"] for history in histories), rtol=1e-4)


def numbers(content):
    """All tensors within a dictionary but for the counters, as vectors."""
    if isinstance(content, dict):
        for value in content.values():
            yield from numbers(value)
    elif isinstance(content, th.Tensor) and content.numel() > 1:
        yield content.double().flatten()


def test_two_ranks_follow_the_path_of_one_under_torchrun(tmp_path, alone):
    folder = tmp_path / "run"
    arguments = training_command(folder, *HALF, "--total_steps", STEPS)
    done = run([*torchrun("--standalone", "--nproc_per_node", 2), *arguments[1:]])
    assert_same_path(folder, alone)
    # Rank 1 says nothing, and leaves nothing behind.
    assert done.stdout.count("run directory: ") == 1 and done.stdout.count("done: ") == 1
    assert "2 processes with 4 images each per step" in done.stdout
    assert len(list(folder.parent.iterdir())) == 1


@needs_mpi
def test_two_ranks_follow_the_path_of_one_under_mpiexec(tmp_path, alone):
    folder = tmp_path / "run"
    done = run([MPIEXEC, "-n", "2", *training_command(folder, *HALF, "--total_steps", STEPS)])
    assert_same_path(folder, alone)
    assert done.stdout.count("done: ") == 1 and done.stderr == ""


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, alone):
    folder = tmp_path / "run"
    run_training(folder, *FLAGS, *WHOLE, "--total_steps", 3)
    with two_ranks(folder, *FLAGS, *HALF, "--total_steps", 9) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0]
    assert "resumed step 3 " in ranks[0].stdout and "WARNING" not in ranks[0].stdout
    assert ranks[1].stdout == ranks[1].stderr == ""
    run_training(folder, *FLAGS, *WHOLE, "--total_steps", STEPS)
    assert_same_state(folder, alone, STEPS)


def test_two_ranks_start_from_the_weights_of_another_run(tmp_path, alone):
    flags = ["--init_from", alone, "--total_steps", 2]
    run_training(tmp_path / "one", *FLAGS, *WHOLE, *flags)
    with two_ranks(tmp_path / "two", *FLAGS, *HALF, *flags) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0]
    assert ranks[0].stdout.count("starts from: ") == 1 and ranks[1].stdout == ranks[1].stderr == ""
    one, two = (checkpoint.read(str(tmp_path / name), 2) for name in ("one", "two"))
    assert one.state["origin"] == two.state["origin"] != {}
    x, y = (th.cat(list(numbers(c.load("model")))) for c in (two, one))
    start = th.cat(list(numbers(checkpoint.read(str(alone), STEPS).load("model"))))
    assert (x - y).norm() < 1e-4 * y.norm() and (start - y).norm() < 0.1 * y.norm()


def test_a_change_of_the_global_batch_is_said(tmp_path):
    run_training(tmp_path / "run", *FLAGS, *WHOLE, "--total_steps", 1)
    training = run_training(tmp_path / "run", *FLAGS, *HALF, "--total_steps", 2)
    assert "--batch_size: 4 images per step in all processes together; before, it was 8" in training.stdout


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(tmp_path, victim):
    with two_ranks(tmp_path / "run", *FLAGS, *ENDLESS) as ranks:
        ranks[0].wait_for_rows(1)
        ranks[victim].signal(signal.SIGKILL)
        killed = time.monotonic()
        survivor = ranks[1 - victim]
        assert survivor.wait() not in (0, None)
        assert time.monotonic() - killed < 60
    assert survivor.stderr.count("\n") == 1 and "another process of this job has ended" in survivor.stderr


KILLED_WHEN_TRAINING = """
import os, runpy, sys, threading, time

def has_rows(table):
    if not os.path.exists(table):
        return False
    with open(table) as file:
        return file.read().count("\\n") > 1

def die(table):
    while not has_rows(table):
        time.sleep(0.05)
    os.kill(os.getpid(), 9)

sys.argv = sys.argv[1:]
if os.environ["PMI_RANK"] == "1":
    threading.Thread(target=die, args=[sys.argv.pop()]).start()
else:
    sys.argv.pop()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@needs_mpi
def test_a_killed_rank_ends_mpiexec(tmp_path):
    folder = tmp_path / "run"
    python, *arguments = training_command(folder, *ENDLESS)
    launched = [MPIEXEC, "-n", "2", python, "-c", KILLED_WHEN_TRAINING, *arguments, folder / "progress.csv"]
    done = subprocess.run(list(map(str, launched)), capture_output=True, timeout=120)
    assert done.returncode != 0 and len(rows(folder)) > 0


@pytest.mark.skipif(os.name != "posix", reason="there are no signals between processes")
def test_sigterm_to_one_rank_stops_both_at_the_same_step(tmp_path):
    folder = tmp_path / "run"
    with two_ranks(folder, *FLAGS, *ENDLESS) as ranks:
        ranks[0].wait_for_rows(1)
        ranks[1].signal(signal.SIGTERM)
        assert [rank.wait() for rank in ranks] == [143, 143]
    (stopped,) = checkpoint.steps(str(folder))
    assert f"stopped by SIGTERM at step {stopped}; to go on: the same command" in ranks[0].stdout
    assert rows(folder)[-1]["step"] == str(stopped) and ranks[0].stderr == ""


def test_a_loss_that_is_not_finite_stops_both_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with two_ranks(folder, *FLAGS, *ENDLESS, "--lr", 1e20, "--skip_nonfinite", 0) as ranks:
        assert [rank.wait() for rank in ranks] == [1, 1]
    (saved,) = checkpoint.steps(str(folder))
    assert f"is not finite (gradient norm nan); checkpoint {saved} has the last finite" in ranks[0].stdout
    assert "To go on, resume with a lower --lr, --grad_clip 1 or --skip_nonfinite 10" in ranks[0].stdout
    assert (folder / "results.xlsx").exists()
    assert [rank.stderr for rank in ranks] == ["", ""]


def test_different_flags_and_different_images_are_refused(tmp_path):

    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a_1.png")
    for flag, value, says in (
        ("--lr", "5e-4", "--lr: rank 1 has 0.0005, rank 0 0.0001"),
        ("--data_dir", images, "--data_dir: rank 1 has '1 images"),
    ):
        place = one_host()
        run_dir = tmp_path / "run"
        with (
            Training(run_dir, *FLAGS, *HALF, environment={**place, "RANK": "0"}) as zero,
            Training(run_dir, *FLAGS, *HALF, flag, value, environment={**place, "RANK": "1"}) as one,
        ):
            assert [zero.wait(), one.wait()] == [2, 2]
        assert says in zero.stderr and zero.stderr.count("\n") == 1
        assert not run_dir.exists()


@needs_mpi
@pytest.mark.parametrize("script", ["image_sample.py", "image_nll.py"])
def test_drawing_and_measuring_are_shared(tmp_path, alone, script, call_script):
    # 3 images at a time, of 7: the second round leaves rank 1 without one.
    flags = ["--model_path", alone, "--num_samples", 7, "--batch_size", 3, "--precision", "fp32"]
    flags += ["--data_dir", "builtin"] if script == "image_nll.py" else []
    one, two = tmp_path / "one", tmp_path / "two"
    assert call_script(script, *flags, "--log_dir", one).returncode == 0
    done = run([MPIEXEC, "-n", "2", *command(script, *flags, "--log_dir", two)])
    assert done.stdout.count(str(two)) <= 3
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for path in one.glob("*.npz"):
        with np.load(path) as expected, np.load(two / path.name) as arrays:
            for name in expected.files:
                a, b = arrays[name].astype(float), expected[name].astype(float)
                assert np.allclose(a, b, rtol=1e-4, atol=1.0 if script == "image_sample.py" else 0), path.name


# -- two hosts -------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them; yields (namespace, interface, address) of each."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux's ip, and root")
    names = [f"test{os.getpid()}{end}" for end in "ab"]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    try:
        done = [ip("netns", "add", name) for name in names]
        done.append(ip("link", "add", names[0], "type", "veth", "peer", "name", names[1]))
        for i, name in enumerate(names):
            done.append(ip("link", "set", name, "netns", name))
            done.append(ip("-n", name, "addr", "add", f"10.213.7.{i + 1}/24", "dev", name))
            done += [ip("-n", name, "link", "set", device, "up") for device in (name, "lo")]
        refused = [result.stderr.strip() for result in done if result.returncode]
        if refused:
            pytest.skip(f"this system allows no network namespaces: {refused[0]}")
        yield [(name, name, f"10.213.7.{i + 1}") for i, name in enumerate(names)]
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_follow_the_path_of_one(tmp_path, alone, two_hosts):
    folder = tmp_path / "run"
    launch = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", two_hosts[0][2], "--master_port", 29517]
    arguments = training_command(folder, *HALF, "--total_steps", STEPS)[1:]
    hosts = [
        subprocess.Popen(
            ["ip", "netns", "exec", namespace, *torchrun(*launch, "--node_rank", number), *arguments],
            env={**os.environ, "GLOO_SOCKET_IFNAME": interface},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, (namespace, interface, _) in enumerate(two_hosts)
    ]
    try:
        outputs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert_same_path(folder, alone)


# -- the parts -------------------------------------------------------------------------------------------


def _draw_until_interrupted(rank, place, folder):
    """The first batch is drawn by both ranks. In the second one, rank 0 is interrupted when rank 1 is done."""
    os.environ.update({**place, "RANK": str(rank)})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    is_done = folder / "done"

    def batches():
        mine = np.zeros((1, 1, 8, 8, 3), np.uint8)
        yield dist_util.gather_arrays(mine)
        if rank == 1:
            is_done.touch()
        else:
            while not is_done.exists():
                time.sleep(0.01)
            time.sleep(0.2)  # now it waits, most likely
            os.kill(os.getpid(), signal.SIGINT)
        yield dist_util.gather_arrays(mine)

    def draw():
        dist_util.setup_dist()
        return save_samples(batches(), str(folder))

    run_script(lambda: draw)


@pytest.mark.skipif(os.name != "posix", reason="a signal would end the process")
def test_an_interrupted_drawing_does_not_leave_others_waiting(tmp_path):
    place = one_host()
    ranks = [
        _context.Process(target=_draw_until_interrupted, args=(rank, place, tmp_path)) for rank in (0, 1)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(PATIENCE)
        assert [process.exitcode for process in ranks] == [130, 2]
    finally:
        for process in ranks:
            process.kill()
    assert (tmp_path / "samples_2x8x8x3.npz").exists()


def test_a_process_alone_needs_nobody():
    dist_util.setup_dist()
    assert (dist_util.get_rank(), dist_util.get_world_size()) == (0, 1)
    tensor, array = th.arange(3.0), np.arange(6).reshape(3, 2)
    dist_util.all_reduce(tensor)
    dist_util.sync_params([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert dist_util.gather_arrays(array) is array
    assert dist_util.all_gather("x") == ["x"] and dist_util.broadcast({"a": 1}) == {"a": 1}
    assert dist_util.share(range(5, 9)) == range(5, 9)
    with dist_util.rank_0_first():
        pass
    dist_util.finish()
    assert dist_util.dev() == th.device("cpu")
    assert not th.distributed.is_initialized()


@pytest.mark.parametrize(
    "environment, size",
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, 3),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 1),  # a batch script, not one of 8 processes
    ],
)
def test_launchers_of_mpi_are_recognized(monkeypatch, environment, size):
    for name in (*dist_util.MPI_SIZES, "PMIX_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dist_util._mpi_size() == size


def test_a_missing_mpi_library_is_named(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"improved_diffusion\[mpi\]"):
        dist_util.setup_dist()


def test_an_address_that_others_cannot_reach_is_refused(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME"):
        dist_util._choose_interface(one_host=False)


def test_silence_is_noticed(monkeypatch, capsys):
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() or sys.exit(code))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    # A hundred beats, because on a busy machine this thread may not get its turn for some of them.
    beat = heartbeat.Heartbeat({"rank 1": ours}, interval=0.01, patience=100)
    with theirs:
        for _ in range(200):
            theirs.send(b".")
            time.sleep(0.01)
        with beat:
            pass
        with beat:  # waiting for a peer that is silent now, though its connection is open
            assert ended.wait(PATIENCE)
    assert "error: lost contact with rank 1" in capsys.readouterr().err


def test_work_is_finished_before_a_loss_matters():
    ours, theirs = socket.socketpair()
    theirs.close()
    beat = heartbeat.Heartbeat({"rank 1": ours}, interval=0.01, patience=2)
    deadline = time.monotonic() + PATIENCE
    while beat._lost is None:  # saving, for example
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(heartbeat.LostContact, match="rank 1"), beat:
        pass
    beat.stop()


def test_strangers_are_turned_away():
    listener = heartbeat.Listener()
    port = int(listener.address.split()[0])
    found = {}
    thread = threading.Thread(target=lambda: found.update(listener.accept(1, timeout=10)))
    thread.start()
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n")
    peers = heartbeat.connect("127.0.0.1", listener.address, rank=3, timeout=10)
    thread.join()
    assert list(found) == ["rank 3"] and list(peers) == ["rank 0"]
    for peer in (*found.values(), *peers.values()):
        peer.close()


def test_nobody_comes():
    with pytest.raises(TimeoutError):
        heartbeat.Listener().accept(1, timeout=0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_echo_of_a_signal_is_not_a_second_one():
    with Interrupts(echo=60.0) as interrupts:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert interrupts.stop == "SIGINT"


def test_shares_cover_everything(monkeypatch):
    job = dist_util._Job(rank=0, size=3, turn=0, heartbeat=None)
    monkeypatch.setattr(dist_util, "_job", job)
    shares = []
    for job.rank in range(3):
        shares.append(dist_util.share(range(10, 21, 2)))
    assert [number for share in shares for number in share] == list(range(10, 21, 2))
    assert {len(share) for share in shares} == {2}
    job.rank = 0
    assert len(dist_util.share(range(2))) in (0, 1)
