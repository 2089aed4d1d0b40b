"""All settings are in pyproject.toml; here is only what it can't say.

The launcher's files and the recipes stand once, at the top of the repository, where `accelerate
launch` is run from; a wheel carries them inside the package, for `lbaccel configs cp` and `--config
NAME`.
"""

from setuptools import find_packages, setup

SHIPPED = {"accelerate_configs": "*.yaml", "ds_configs": "*.json", "recipes": "*.yaml"}

setup(
    packages=[*find_packages(include=["lbaccel*"]), *(f"lbaccel.{folder}" for folder in SHIPPED)],
    package_dir={f"lbaccel.{folder}": folder for folder in SHIPPED},
    package_data={
        "lbaccel": ["py.typed"],
        "lbaccel.studies": ["library/*/*"],
        "lbaccel.report": ["*.j2", "*.css", "*.js"],
        **{f"lbaccel.{folder}": [files] for folder, files in SHIPPED.items()},
    },
)
