"""A cloud for tests: blobfile's remote side, played by a folder."""

import os
from pathlib import Path

import blobfile as bf

BUCKET = "gs://bucket/"


class Cloud:
    """Stands in for blobfile's remote side: what is below `BUCKET` lies in a folder.

    As in a cloud, an object is there as a whole or not at all.

    :param monkeypatch: pytest's, which takes this place of blobfile's functions and may give it back.
    :ivar changes: what was written ("+ name") and removed ("- name"), in order.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.changes: list[str] = []
        self._outage, self._upload = folder.with_name("outage"), folder.with_name("upload")
        self._real = {name: getattr(bf, name) for name in ("BlobFile", "copy", "remove", "scandir")}
        for name in ("exists", "isdir", "listdir", "stat"):
            real = getattr(bf, name)
            monkeypatch.setattr(bf, name, lambda path, real=real: real(self.local(path)))
        for name in (*self._real, "makedirs"):
            monkeypatch.setattr(bf, name, getattr(self, name))

    @property
    def broken(self) -> bool:
        """Whether nothing can be written at present; a file keeps it, for all processes."""
        return self._outage.exists()

    @broken.setter
    def broken(self, value: bool) -> None:
        self._outage.touch() if value else self._outage.unlink(missing_ok=True)

    def local(self, url):
        """Where it really lies; a folder that does not exist is nowhere, as in a cloud."""
        return str(self.folder / url.removeprefix(BUCKET)) if url.startswith(BUCKET) else url

    def BlobFile(self, path, mode="r"):
        assert path.startswith(BUCKET) <= (mode == "rb"), "remote files are written by `open_atomic`"
        return self._real["BlobFile"](self.local(path), mode)

    def copy(self, source, target, overwrite=False):
        if not target.startswith(BUCKET):
            self._real["copy"](self.local(source), target, overwrite=overwrite)
            return
        if self.broken:
            raise bf.Error("no connection")
        self.changes.append(f"+ {bf.basename(target)}")
        path = Path(self.local(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        assert overwrite or not path.exists()
        self._real["copy"](self.local(source), str(self._upload), overwrite=True)
        self._upload.replace(path)

    def remove(self, path):
        if path.startswith(BUCKET):
            if self.broken:
                raise bf.Error("no connection")
            self.changes.append(f"- {bf.basename(path)}")
        self._real["remove"](self.local(path))

    def scandir(self, path):
        for entry in self._real["scandir"](self.local(path)):
            yield (
                entry
                if entry.path == path
                else type(entry)(
                    bf.join(path, entry.name), entry.name, entry.is_dir, entry.is_file, entry.stat
                )
            )

    def makedirs(self, path):
        """Clouds have no folders to make."""
        if not path.startswith(BUCKET):
            os.makedirs(path, exist_ok=True)
