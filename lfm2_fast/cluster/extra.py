"""Check of the extra "ray"."""

from lfm2_fast.server.run import check_extra as check_server


def node_cores() -> list[float]:
    """Return the cores of each node of the cluster that this process is in; none before that."""
    import ray

    if not ray.is_initialized():
        return []
    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def check_extra() -> None:
    """Raise ImportError, with the remedy, if the extra "ray" or "server" is not installed."""
    check_server()
    try:
        import ray  # noqa: F401
        import ray.data  # noqa: F401
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"replicas and batches on Ray need the extra of that name ({error}): "
            "pip install 'lfm2-fast[server,ray]'"
        ) from error
