"""Scripts outside of the packages, as modules."""

import sys
from importlib.util import module_from_spec, spec_from_file_location


def load_script(path):
    """A script as a module, without running its `main`."""
    spec = spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
