"""ExportError: an export that cannot be made, does not compute the model, or does not run."""


class ExportError(RuntimeError):
    """Error of an exporter, of its environment, or of a file that fails its proof."""
