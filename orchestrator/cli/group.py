"""The group of all commands: a mistake is one sentence and exit code 2."""

import click


class _Commands(click.Group):
    """Commands in the order of a study, with a suggestion for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were declared."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            near = difflib.get_close_matches(args[0], self.commands, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else "."
            raise click.UsageError(f"There is no command '{args[0]}'{meant} See fixstudy --help.", ctx) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fixstudy", message="%(prog)s %(version)s")
def cli() -> None:
    """Tells which fixing approach to use on a failing model, and what it will break.

    A study runs fixers on subjects, with seeds and hyper-parameters, and writes Parquet that any SQL tool reads.
    Start with: fixstudy run examples/quickstart.yaml
    """
