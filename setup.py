"""Lists the packages: setup.cfg cannot add the mapped ``recbole_llm.properties`` to those that are found."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["recbole_llm", "recbole_llm.*"]), "recbole_llm.properties"])
