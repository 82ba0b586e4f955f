"""What a person may change for one run in the launchpad or by --config-json, derived from the stage's settings."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Generic, Literal, Optional, TypeVar, Union

import dagster as dg
from pydantic import Field, ValidationError, create_model

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.settings import EncodingSettings, ModelSource, Settings
from embed_pipeline.wrong_values import sentences

SCALARS = (bool, int, float, str)
# A base model and its encoding are part of a pipeline's identity: mining and evaluation use them too.
FIXED_FOR_A_PIPELINE = (ModelSource, EncodingSettings)


def overrides_of(settings_class: type[Settings], name: str) -> type[dg.Config]:
    """A Dagster config class with the scalar fields of `settings_class`, all optional, nested settings included."""
    fields: dict[str, Any] = {}
    for field_name, field in settings_class.model_fields.items():
        kind = _config_type(field.annotation, f"{name}_{field_name}")
        if kind is not None:
            shown = "" if field.is_required() else f"YAML default: {field.get_default(call_default_factory=True)}"
            text = ". ".join(part for part in (field.description, shown) if part)
            fields[field_name] = (Optional[kind], Field(None, description=text))  # noqa: UP045
    return create_model(name, __base__=dg.Config, **fields)


S = TypeVar("S", bound=Settings)


class Overrides(Generic[S]):
    """What one run may change of a stage's settings: the config schema of its asset, and how it is laid over them.

    The schema is made once, not with the asset of each pipeline: it takes longer to make than the rest of an asset.
    """

    def __init__(self, settings_class: type[S]) -> None:
        self.schema = overrides_of(settings_class, f"{settings_class.__name__}Overrides").to_config_schema().as_field()

    def applied(self, settings: S, context: dg.AssetExecutionContext) -> S:
        """`settings` with what was given for this run; raises ConfigurationError naming the key that cannot be."""
        given = _given(context.op_execution_context.op_config)
        if not given:
            return settings
        try:
            return type(settings).model_validate(_merged(settings.model_dump(), given))
        except ValidationError as error:
            raise ConfigurationError(f"this run's overrides do not fit: {sentences(error)}") from error


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    # Dagster fills what was left out of nested config with null, so null says: as in the YAML.
    return {
        name: _given(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if value is not None
    }


def _merged(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(settings[k] or {}, v) if isinstance(v, Mapping) else v for k, v in given.items()}
    return {**settings, **nested}


def _config_type(annotation: Any, name: str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, FIXED_FOR_A_PIPELINE):
        return None
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return overrides_of(annotation, name)
    if annotation in SCALARS:
        return annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _config_type(arguments[0], name)
    if origin is Literal:
        return str
    if origin in (Union, types.UnionType):
        kinds = [_config_type(a, name) for a in arguments if a is not type(None)]
        # "auto" or a number: pydantic says what it has to be when it validates.
        return kinds[0] if len(kinds) == 1 else (Any if kinds and all(k in SCALARS for k in kinds) else None)
    return None
