"""Write a bundle's bill of materials: the model and its lineage, the files, the packages that made them.

CycloneDX 1.6, JSON (https://cyclonedx.org/docs/1.6/json/). The serial number follows from the contents and there is no
time, so that the same bundle has the same bill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from uuid import UUID, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType, Pedigree
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

import edgepipe
from edgepipe.artifacts import Json, Licence, ModelInfo

FILE_NAME = "sbom.cdx.json"
_NAMESPACE = UUID("0f5b6f0a-6f0f-5d0b-9f0e-7d1c5b1f7a10")  # of edgepipe's bills; any would do, it must only stay


def bill_of_materials(info: ModelInfo, files: Mapping[str, Json], versions: Mapping[str, str]) -> Json:
    """Return the bill of a model's bundle as JSON.

    :param files: file → bytes and sha256, as in the manifest.
    :param versions: package → version, of what decides the bytes; edgepipe itself is added.
    """
    model = Component(
        name=info.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        licenses=[LicenseFactory().make_from_string(info.licence.id)],
        pedigree=_pedigree(info.licence),
        properties=[
            Property(name="edgepipe:task", value=info.task),
            Property(name="edgepipe:source", value=info.licence.source),
            Property(name="edgepipe:source-sha256", value=info.fingerprint),
        ],
    )
    parts = [_file(name, facts) for name, facts in files.items()]
    packages = [
        _package(name, version) for name, version in ({"edgepipe": edgepipe.__version__} | {**versions}).items()
    ]
    bom = Bom(serial_number=UUID(int=0), components=[*parts, *packages])
    bom.metadata.component = model
    bom.register_dependency(model, parts)
    bill: Json = json.loads(JsonV1Dot6(bom).output_as_string())
    del bill["metadata"]["timestamp"]  # the library always writes one
    del bill["serialNumber"]
    contents = json.dumps(bill, sort_keys=True, ensure_ascii=False)
    return bill | {"serialNumber": uuid5(_NAMESPACE, contents).urn}


def _pedigree(licence: Licence) -> Pedigree:
    """Return what the model was made from. CycloneDX has no order among ancestors: a note keeps it."""
    lineage = list(dict.fromkeys((licence.source, *licence.lineage)))  # a card may name its own model again
    ancestors = [
        Component(name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=f"ancestor:{place}")
        for place, name in enumerate(lineage)
    ]
    return Pedigree(ancestors=ancestors, notes=f"nearest first: {', '.join(lineage)}")


def _file(name: str, facts: Json) -> Component:
    """Return a file of the bundle."""
    return Component(
        name=name,
        type=ComponentType.FILE,
        bom_ref=f"file:{name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=facts["sha256"])],
        properties=[Property(name="edgepipe:bytes", value=str(facts["bytes"]))],
    )


def _package(name: str, version: str) -> Component:
    """Return a package that made the bundle; none of it is inside."""
    return Component(
        name=name,
        type=ComponentType.LIBRARY,
        bom_ref=f"package:{name}",
        version=version,
        scope=ComponentScope.EXCLUDED,
        purl=PackageURL("pypi", name=name, version=version),
    )
