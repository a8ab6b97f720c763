//! A web server that takes its time over every answer; it knows nothing of who asks.

use std::io;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::sleep;

use super::echo::serve;
use super::host::Host;

/// Answers requests with an empty 200; it ends when it is dropped.
pub struct LateServer {
    _events: Runtime,
}

impl LateServer {
    /// Listens on all IPv4 addresses of a host, and answers so long after each request.
    pub fn start(host: &Host, port: u16, after: Duration) -> Result<Self> {
        Ok(Self { _events: serve(host, port, move |stream| answer(stream, after))? })
    }
}

async fn answer(stream: TcpStream, after: Duration) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    // The head ends with an empty line.
    while stream.read_line(&mut line).await? > 2 {
        line.clear();
    }
    sleep(after).await;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
    stream.shutdown().await
}
