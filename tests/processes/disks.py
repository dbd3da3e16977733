"""A disk of one's own that is soon full, for a process in a namespace of its own."""

import subprocess


def small_disk(folder, size):
    """The command that runs another with a disk mounted on a folder; None where that can't be."""
    mount = f'mount -t tmpfs -o size={size} none {folder} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        works = False
    return command if works else None
