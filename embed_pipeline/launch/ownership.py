"""Who else may write what a job is about to believe.

A job's files decide what code runs (the model, its checkpoints), and its processes meet in files. Both are believed
because of who owns them, so this is looked at before they are used.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from embed_pipeline.errors import TrainingError


def make_private(folder: Path) -> None:
    """Create `folder` (and its parents) for its owner alone. Raises FileExistsError where it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)


def check_private(folder: Path) -> None:
    """Raises TrainingError unless `folder` is a folder of this user that no other user can enter."""
    told = folder.lstat()
    if not stat.S_ISDIR(told.st_mode):
        raise TrainingError(
            f"{folder} is not a folder; the processes of a job meet in a folder of their own. Remove it"
        )
    mode = stat.S_IMODE(told.st_mode)
    if told.st_uid != os.geteuid() or mode & 0o077:
        raise TrainingError(
            f"{folder} belongs to {_user(told.st_uid)} with mode {mode:04o}; the processes of a job meet there, so it "
            f"has to belong to {_user(os.geteuid())} with mode 0700: whoever can write to it takes part in the job"
        )


def check_only_ours(path: Path, root: Path) -> None:
    """Raises TrainingError unless `path` lies in `root`, links followed, and no other user can change or replace it.

    It and every folder up to `root` have to belong to this user and not be writable by others; a group whose only
    member is this user counts as this user.
    """
    try:
        real, top = path.resolve(), root.resolve()
    except (ValueError, RuntimeError) as error:  # a null character, links in a circle
        raise TrainingError(f"{str(path)!r} is no path of a file: {error}") from error
    if not real.is_relative_to(top):
        raise TrainingError(f"{path} lies outside of {root}; a job's file has to lie in the store")
    for one in (real, *real.parents):
        told = one.stat()
        mode = stat.S_IMODE(told.st_mode)
        if told.st_uid != os.geteuid():
            raise TrainingError(
                f"{one} belongs to {_user(told.st_uid)}, and this process runs as {_user(os.geteuid())}; a job is only "
                "taken from files of the same user. Run both as one user"
            )
        if _has_access_list(one):
            raise TrainingError(
                f"{one} has an access control list, so other users may be able to change what this user would run; "
                f"expected the plain permissions of its owner. Remove it: setfacl -b '{one}'"
            )
        shared = mode & stat.S_IWGRP and not _is_alone_in(told.st_gid)
        if shared or mode & stat.S_IWOTH:
            raise TrainingError(
                f"{one} has mode {mode:04o}, so other users can change what this user would run; expected no write "
                f"permission for group and others. Set it: chmod go-w '{one}', and umask 022 for what writes the store"
            )
        if one == top:
            return


def _is_alone_in(gid: int) -> bool:
    """Whether a group is a user's private one, as many systems make it: of the user's name, without others."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    others = [other for other in pwd.getpwall() if other.pw_gid == gid and other.pw_uid != user.pw_uid]
    private = gid != 0 and user.pw_gid == gid and group.gr_name == user.pw_name  # containers give group 0 to anybody
    return private and set(group.gr_mem) <= {user.pw_name} and not others


def _has_access_list(path: Path) -> bool:
    """Whether others were given access to a file or folder beyond its mode (POSIX or NFSv4 lists, on Linux)."""
    if not hasattr(os, "listxattr"):
        return False
    try:
        return bool({"system.posix_acl_access", "system.nfs4_acl"} & set(os.listxattr(path)))
    except OSError:  # the file system has none
        return False


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
