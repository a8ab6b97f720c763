//! `xlb status`: what the agent knows, as tables or as JSON.

use super::{Format, RunDir, output};
use crate::agent::status::Status;
use crate::api::Client;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    run_dir: RunDir,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let client = Client::new(&arguments.run_dir.run_dir);
    let status: Status = client.get("/v1/status").await?;
    match arguments.output {
        Format::Json => say!("{}", serde_json::to_string_pretty(&status)?),
        Format::Table => print(&status),
    }
    Ok(())
}

fn print(status: &Status) {
    let interfaces: Vec<String> =
        status.interfaces.iter().map(|i| format!("{} ({})", i.name, i.mode)).collect();
    say!(
        "xlb {} on {}, up {}, process {}, {}",
        status.version,
        interfaces.join(", "),
        output::duration(status.uptime_seconds),
        status.pid,
        status.config_file
    );
    if let Some(error) = status.last_reload.as_ref().and_then(|reload| reload.error.as_ref()) {
        say!("\nThe last reload was refused, the configuration before it is in force:\n{error}");
    }
    let services = status.services.iter().map(|s| {
        vec![
            s.name.clone(),
            std::net::SocketAddr::new(s.vip, s.port).to_string(),
            s.protocol.clone(),
            s.scheduler.clone(),
            s.pool.clone(),
            format!("{}/{}", s.backends_up, s.backends),
            s.packets.to_string(),
            output::bytes(s.bytes),
        ]
    });
    let header = ["SERVICE", "VIP", "PROTOCOL", "SCHEDULER", "POOL", "UP", "PACKETS", "BYTES"];
    say!("\n{}", output::table(&header, &[5, 6, 7], services.collect()));

    let pool_slots =
        |pool: &str| status.backends.iter().filter(|b| b.pool == pool).map(|b| b.slots).sum::<u64>();
    let backends = status.backends.iter().map(|b| {
        let of = pool_slots(&b.pool);
        let share =
            if of == 0 { "-".to_owned() } else { format!("{:.1} %", b.slots as f64 * 100.0 / of as f64) };
        vec![
            b.pool.clone(),
            b.name.clone(),
            b.address.to_string(),
            b.forward.clone(),
            b.weight.to_string(),
            b.state.clone(),
            share,
            b.packets.to_string(),
            output::bytes(b.bytes),
            b.check.clone(),
        ]
    });
    let header =
        ["POOL", "BACKEND", "ADDRESS", "FORWARD", "WEIGHT", "STATE", "SHARE", "PACKETS", "BYTES", "CHECK"];
    say!("\n{}", output::table(&header, &[4, 6, 7, 8], backends.collect()));

    let outcomes = status.outcomes.iter().filter(|outcome| outcome.packets > 0);
    let outcomes = outcomes.map(|o| vec![o.name.clone(), o.packets.to_string(), o.meaning.clone()]);
    say!("\n{}", output::table(&["OUTCOME", "PACKETS", "MEANING"], &[1], outcomes.collect()));
}
